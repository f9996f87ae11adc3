"""Opens a pack: its manifest, its memory-mapped weights, its graphs, and what turns a raw sample into model input."""
