"""The demo: an MCP client has a language model write samples, and trains a classifier on them, in one submission."""
