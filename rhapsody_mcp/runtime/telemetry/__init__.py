"""Spans and metrics of tasks, where OpenTelemetry is configured in this process."""
