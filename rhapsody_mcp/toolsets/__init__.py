"""What an agent can do: one class a toolset, one thin method a tool; the text that the model reads is its card."""
