"""Turns methods into MCP tools: arguments, schemas, errors, confirmations, and calls that outlast their client."""
