"""What looping is, shown in minutes: a trained model, then two that learn before your eyes."""
