"""Kernels of a device against their twins, under Triton's interpreter or on a card."""
