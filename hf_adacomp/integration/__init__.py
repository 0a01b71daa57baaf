"""What makes compressed tables at home in transformers: finding and replacing tables, loading, saving, training."""
