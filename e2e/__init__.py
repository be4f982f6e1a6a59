"""End-to-end ground: the real etcd, kube-apiserver, kube-scheduler, kubelet and containerd."""
