"""What other libraries have to be told about grkan. Nothing here imports one: each is told when somebody else does."""
