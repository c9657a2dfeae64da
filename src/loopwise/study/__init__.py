"""Questions about looped models, answered with arrays that have named axes."""
