"""What kube-scheduler calls: filter, prioritize, preempt, bind. Decoded values in, values to encode out; no Flask."""
