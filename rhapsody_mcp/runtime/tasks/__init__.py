"""The tasks that a user holds: thin handles over a spec and an outcome, updated in place."""

from rhapsody_mcp.runtime.tasks.ai_task import AITask
from rhapsody_mcp.runtime.tasks.compute_task import ComputeTask
from rhapsody_mcp.runtime.tasks.for_each import ForEach, child_named, kind_of, leaves, split_item_name, with_children
from rhapsody_mcp.runtime.tasks.task import (
    MOST_PRIORITY,
    Condition,
    OnUpstreamFailure,
    Part,
    Rank,
    Task,
    Text,
    is_hidden,
    name_of,
    rank_of,
    reference,
    tasks_text,
)

__all__ = [
    "MOST_PRIORITY",
    "AITask",
    "ComputeTask",
    "Condition",
    "ForEach",
    "OnUpstreamFailure",
    "Part",
    "Rank",
    "Task",
    "Text",
    "child_named",
    "is_hidden",
    "kind_of",
    "leaves",
    "name_of",
    "rank_of",
    "reference",
    "split_item_name",
    "tasks_text",
    "with_children",
]
