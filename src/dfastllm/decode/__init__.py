"""Decoders: pure policies that plan spans and turn logits into commits.

Here: the policy protocol and its law, sampling, autoregression, unmasking rules, canvas diffusion and its caches, block
diffusion, the registry. Not here: K,V storage, scheduling, models, tokenizers, stop strings.
"""
