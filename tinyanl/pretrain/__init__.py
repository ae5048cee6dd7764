"""What made the embedded weights: pictures to learn from, and a stage for each model."""
