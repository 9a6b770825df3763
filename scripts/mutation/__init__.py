"""Mutation testing: whether the suite notices a fault that is put into the source. scripts/mutants is its command.

places draws mutants with a mutation library (in an environment of its own); handmade lists faults that people make;
tree prepares clean copies of a commit; reach records which test reaches which line; trial puts one mutant into a copy
and runs the tests that reach it (forks starts them quickly); record writes what came of all; count goes through it.
"""
