"""Device profiles and fleet files: what users write about their boards, checked against a schema.

The profiles of this folder hold declared limits only, each with its source. Nothing here was measured on a board.
"""
