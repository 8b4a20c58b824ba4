"""Base model, adapters and head; loss; optimizer and learning rate schedule."""
