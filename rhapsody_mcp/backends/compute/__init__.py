"""Runs functions and programs in the processes of an engine, for the Dragon and the local backend."""
