"""Programs that run elsewhere: they launch, watch and end the processes of tasks and of model servers."""
