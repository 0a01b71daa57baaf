"""What people look at: rows of tokens, pictures, model cards. Nothing that loads or trains a model needs it."""
