"""This room turns settings into everything but the weights: files, family, prompt, window, identity and plan.

It is the only way in: reranking, generating, the command line and the benchmarks open models here.
"""
