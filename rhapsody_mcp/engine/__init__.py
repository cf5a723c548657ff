"""Programs that run elsewhere: they place, watch and end the processes of tasks and of model servers."""
