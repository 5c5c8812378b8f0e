"""What a training run takes, before it is paid for."""
