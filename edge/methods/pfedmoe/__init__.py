"""pFedMoE: devices with models of their own share a small extractor, and a gate weighs both for each sample."""
