"""References between tasks: results, and items of for_each, that stand in the fields of other tasks."""
