"""What was compared and measured: nobody needs it to train or to sample."""
