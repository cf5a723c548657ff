"""MCP over HTTP: listeners, authorization, tokens and limits."""
