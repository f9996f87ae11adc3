"""What training a model, and answering with it, takes on one machine, beside its peers."""
