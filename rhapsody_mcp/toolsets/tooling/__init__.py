"""What turns methods into MCP tools: cards, schemas, errors, confirmations."""
