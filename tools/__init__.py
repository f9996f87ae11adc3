"""The operator's commands. This is the only package that may import torch, transformers or optimum."""
