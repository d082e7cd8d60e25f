"""The verbs of the command that look after a dataset, a module each. A verb imports what it needs when it runs."""
