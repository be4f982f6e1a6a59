"""What kube-scheduler calls: filter, prioritize, bind. Decoded values in, values to encode out; no Flask, no clock."""
