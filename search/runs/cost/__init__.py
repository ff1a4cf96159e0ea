"""What trials and studies cost, measured in two seconds before they run."""
