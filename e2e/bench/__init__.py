"""What the extender and the plugin cost: `make bench`, `make bench-quick`, `python -m e2e.bench --help`.

load        pods, clients and clocks that all parts share
verbs       filter, prioritize and bind on a real API server, called as kube-scheduler calls them
allocate    Allocate, by a real kubelet's own histogram
throughput  pods a second by a real kube-scheduler, with and without us, in interleaved rounds
herd        more pods at once than there is room for
large       start, memory and filter with 50,000 pods, and with 20,000 nodes, on a real API server
growth      start, memory and verbs from 100 to 20,000 nodes, on an API server that stands still (still)
histogram   quantiles of what kube-scheduler and the extender count themselves
report      tables, JSON and a plot
"""
