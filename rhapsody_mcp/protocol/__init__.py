"""What the protocol has besides tools: resources and their changes, prompts, completions, calls as tasks."""
