"""MCP on stdin and stdout."""
