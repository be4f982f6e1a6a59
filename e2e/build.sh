#!/usr/bin/env bash
# Builds the real components that `make e2e` starts, from the Go module proxy, and caches them by version:
# kube-apiserver, kube-scheduler, kube-controller-manager (which counts quotas), kubelet, containerd with its runc shim, and
# ctr; on demand also what installs us: kubectl, helm, the CNI plugins that give pods a network, and promtool.
#
#   e2e/build.sh BINDIR [kube-apiserver|kube-scheduler|kubelet|containerd|kubectl|kube-controller-manager|helm|cni|promtool ...]
#
# A component that BINDIR already holds in the right version is left alone, so a second run costs nothing.
set -euo pipefail

KUBERNETES=v1.36.3
# Debian's containerd 1.6 has no CDI field in CRI, so the strategy `cdi-cri` needs 2.x.
CONTAINERD=v2.4.2
HELM=v4.3.1
CNI=v1.9.1
PROMETHEUS=v0.313.0

bin=$(realpath -m "$1")
shift
wanted=${*:-kube-apiserver kube-scheduler kube-controller-manager kubelet containerd}
mkdir -p "$bin"

command -v go >/dev/null || {
	echo "e2e/build.sh: the Go toolchain is missing; install Go >= 1.26, or put the binaries into $bin yourself" >&2
	exit 1
}

have() { [ -x "$bin/$1" ] && [ "$(cat "$bin/$1.version" 2>/dev/null)" = "$2" ]; }

kubernetes_module() {
	# k8s.io/kubernetes replaces its staging modules by paths of its own repository; a module that requires it has to
	# point each of them at the twin published under v0.<minor>.<patch>.
	local module=$bin/module-kubernetes staging=v0.${KUBERNETES#v1.} source name
	[ -e "$module/done-$KUBERNETES" ] && grep -q cmd/kubectl "$module/tools.go" && return
	rm -rf "$module" && mkdir -p "$module"
	source=$(cd "$module" && GOFLAGS=-mod=mod go mod download -json "k8s.io/kubernetes@$KUBERNETES" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
	{
		printf 'module cotenant.io/e2e/kubernetes\n\ngo 1.26\n\nrequire k8s.io/kubernetes %s\n\nreplace (\n' "$KUBERNETES"
		sed -nE "s#^[[:space:]]*(k8s\\.io/[^ ]+) => \\./staging.*#\\t\\1 => \\1 $staging#p" "$source/go.mod"
		printf ')\n'
	} >"$module/go.mod"
	{
		printf '//go:build tools\n\npackage tools\n\nimport (\n'
		for name in kube-apiserver kube-scheduler kubelet kube-controller-manager kubectl; do printf '\t_ "k8s.io/kubernetes/cmd/%s"\n' "$name"; done
		printf ')\n'
	} >"$module/tools.go"
	(cd "$module" && go mod tidy -e >tidy.log 2>&1) || { cat "$module/tidy.log" >&2; exit 1; }
	touch "$module/done-$KUBERNETES"
}

build_kubernetes() {
	local name=$1 version=k8s.io/component-base/version minor=${KUBERNETES#v1.}
	have "$name" "$KUBERNETES" && return
	echo "building $name $KUBERNETES" >&2
	kubernetes_module
	(cd "$bin/module-kubernetes" && CGO_ENABLED=0 go build -trimpath -o "$bin/$name" \
		-ldflags "-s -w -X $version.gitVersion=$KUBERNETES -X $version.gitMajor=1 -X $version.gitMinor=${minor%%.*}" \
		"k8s.io/kubernetes/cmd/$name")
	echo "$KUBERNETES" >"$bin/$name.version"
}

build_containerd() {
	have containerd "$CONTAINERD" && return
	echo "building containerd $CONTAINERD" >&2
	local name
	for name in containerd containerd-shim-runc-v2 ctr; do
		GOBIN=$bin CGO_ENABLED=0 go install -trimpath -tags no_btrfs -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$CONTAINERD" \
			"github.com/containerd/containerd/v2/cmd/$name@$CONTAINERD"
	done
	echo "$CONTAINERD" >"$bin/containerd.version"
}

build_helm() {
	have helm "$HELM" && return
	echo "building helm $HELM" >&2
	GOBIN=$bin CGO_ENABLED=0 go install -trimpath -ldflags "-s -w" "helm.sh/helm/v4/cmd/helm@$HELM"
	echo "$HELM" >"$bin/helm.version"
}

build_promtool() {
	# Prometheus' module replaces others, so it can be built only from a module of one's own.
	have promtool "$PROMETHEUS" && return
	echo "building promtool $PROMETHEUS" >&2
	local module=$bin/module-prometheus
	rm -rf "$module" && mkdir -p "$module"
	printf 'module cotenant.io/e2e/prometheus\n\ngo 1.26\n' >"$module/go.mod"
	printf '//go:build tools\n\npackage tools\n\nimport _ "github.com/prometheus/prometheus/cmd/promtool"\n' >"$module/tools.go"
	(cd "$module" && GOFLAGS=-mod=mod go get "github.com/prometheus/prometheus@$PROMETHEUS" 2>/dev/null &&
		GOFLAGS=-mod=mod CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$bin/promtool" github.com/prometheus/prometheus/cmd/promtool)
	echo "$PROMETHEUS" >"$bin/promtool.version"
}

build_cni() {
	have ptp "$CNI" && return
	echo "building CNI plugins $CNI" >&2
	GOBIN=$bin CGO_ENABLED=0 go install -trimpath -ldflags "-s -w" \
		"github.com/containernetworking/plugins/plugins/main/ptp@$CNI" \
		"github.com/containernetworking/plugins/plugins/main/loopback@$CNI" \
		"github.com/containernetworking/plugins/plugins/ipam/host-local@$CNI"
	echo "$CNI" >"$bin/ptp.version"
}

for component in $wanted; do
	case $component in
	kube-apiserver | kube-scheduler | kubelet | kube-controller-manager | kubectl) build_kubernetes "$component" ;;
	containerd) build_containerd ;;
	helm) build_helm ;;
	cni) build_cni ;;
	promtool) build_promtool ;;
	*)
		echo "e2e/build.sh: unknown component $component" >&2
		exit 2
		;;
	esac
done
