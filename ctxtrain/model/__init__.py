"""Base, adapters and head; loss; optimizer and schedule."""
