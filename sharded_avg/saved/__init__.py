"""Our own format: a torch.distributed.checkpoint folder and its manifest."""
