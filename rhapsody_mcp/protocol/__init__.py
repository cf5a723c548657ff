"""MCP features besides tools: resources, subscriptions, prompts, completions, the Tasks extension, and the audit."""
