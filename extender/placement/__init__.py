"""Where a pod fits, what each place is worth to it, and whom to evict where it fits nowhere."""
