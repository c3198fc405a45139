"""From images to numbers: features, moments and distances. Knows images, not who made them."""
