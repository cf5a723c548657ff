"""The demo: one submission in which a language model writes samples and a classifier is trained on them."""
