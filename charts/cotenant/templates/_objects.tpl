{{/*
Renders a file of the manifests: include "cotenant.file" (list $ "base/device-plugin.yaml").
Domains and namespace are replaced in its text; what else values say is set in its objects, one kind after the other.
*/}}
{{- define "cotenant.file" -}}
{{- $root := index . 0 -}}
{{- range splitList "\n---\n" (include "cotenant.text" .) }}
{{- $object := fromYaml . }}
{{- if and $object (not (include "cotenant.tooNew" (list $root $object))) }}
{{- include "cotenant.adjust" (list $root $object) }}
---
{{ toYaml $object }}
{{- end }}
{{- end }}
{{- end }}

{{/*
Says so of policies that the cluster is too old for: ValidatingAdmissionPolicy is in v1 since 1.30, and the tokens of pods name
their node since 1.32, without which a device plugin could write to no node at all.
*/}}
{{- define "cotenant.tooNew" -}}
{{- $object := index . 1 -}}
{{- $since := get (dict "cotenant-writer" "1.30.0-0" "cotenant-extender" "1.30.0-0" "cotenant-device-plugin" "1.32.0-0") $object.metadata.name -}}
{{- if and $since (hasPrefix "ValidatingAdmissionPolicy" $object.kind) -}}
{{- if semverCompare (printf "<%s" $since) (index . 0).Capabilities.KubeVersion.Version }}yes{{ end -}}
{{- end -}}
{{- end }}

{{- define "cotenant.text" -}}
{{- $root := index . 0 -}}
{{- $path := printf "files/%s" (index . 1) -}}
{{- $text := $root.Files.Get $path -}}
{{- if not $text }}{{ fail (printf "%s is not in the chart: where links are not kept, package it with `helm package`" $path) }}{{ end -}}
{{- /* links to our pages stay */ -}}
{{- $text | replace "cotenant-system" $root.Release.Namespace | replace "cotenant.io" $root.Values.domain | replace "nvidia.com/mig-" (printf "%s/mig-" $root.Values.migDomain) | replace (printf "https://%s" $root.Values.domain) "https://cotenant.io" -}}
{{- end }}

{{- define "cotenant.adjust" -}}
{{- $root := index . 0 -}}
{{- $object := index . 1 -}}
{{- include "cotenant.labels" (list $root $object.metadata) -}}
{{- if eq $object.kind "Deployment" -}}
{{- include "cotenant.pod" (list $root $object $root.Values.extender) -}}
{{- /* without the policy cotenant-writer two replicas could give the same memory away */ -}}
{{- if semverCompare "<1.30.0-0" $root.Capabilities.KubeVersion.Version -}}
{{- $_ := set $object.spec "replicas" 1 -}}
{{- $_ := set $object.spec "strategy" (dict "type" "Recreate") -}}
{{- end -}}
{{- if eq (include "cotenant.admission" $root) "webhook" -}}{{- include "cotenant.serveTLS" (list $root $object) -}}{{- end -}}
{{- else if eq $object.kind "DaemonSet" -}}
{{- include "cotenant.components" (list $root $object) -}}
{{- include "cotenant.pod" (list $root $object $root.Values.devicePlugin) -}}
{{- else if hasSuffix "AdmissionPolicy" $object.kind -}}
{{- include "cotenant.policy" (list $root $object) -}}
{{- else if hasSuffix "WebhookConfiguration" $object.kind -}}
{{- with $root.Values.webhook.annotations }}{{ $_ := set $object.metadata "annotations" . }}{{ end -}}
{{- /* left out where it is not known, so that what cert-manager has put there stays */ -}}
{{- with $ca := get (include "cotenant.certificate" $root | fromYaml) "ca.crt" }}{{ range $webhook := $object.webhooks }}{{ $_ := set $webhook.clientConfig "caBundle" $ca }}{{ end }}{{ end -}}
{{- else if has $object.kind (list "ServiceMonitor" "PodMonitor" "PrometheusRule") -}}
{{- $_ := set $object.metadata "labels" (merge (deepCopy $root.Values.monitoring.labels) $object.metadata.labels) -}}
{{- if and (eq $object.kind "ServiceMonitor") (eq (include "cotenant.admission" $root) "webhook") -}}
{{- range $object.spec.endpoints }}{{ $_ := set . "scheme" "https" }}{{ $_ := set . "tlsConfig" (dict "insecureSkipVerify" true) }}{{ end -}}
{{- end -}}
{{- else if eq $object.kind "NetworkPolicy" -}}
{{- include "cotenant.network" (list $root $object) -}}
{{- end -}}
{{- end }}

{{- define "cotenant.labels" -}}
{{- $root := index . 0 -}}
{{- $metadata := index . 1 -}}
{{- $own := dict "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version) "app.kubernetes.io/instance" $root.Release.Name "app.kubernetes.io/managed-by" $root.Release.Service "app.kubernetes.io/version" $root.Chart.AppVersion -}}
{{- $_ := set $metadata "labels" (merge $own ($metadata.labels | default dict)) -}}
{{- end }}

{{/* A workload's pods: whatever values name replaces what the manifest has. */}}
{{- define "cotenant.pod" -}}
{{- $root := index . 0 -}}
{{- $object := index . 1 -}}
{{- $values := index . 2 -}}
{{- $template := $object.spec.template -}}
{{- $spec := $template.spec -}}
{{- $_ := set $template.metadata "labels" (merge $template.metadata.labels (deepCopy $values.podLabels)) -}}
{{- $own := deepCopy $values.podAnnotations -}}
{{- /* the nursery reads none */ -}}
{{- if ne $object.metadata.name "cotenant-mps-nursery" -}}
{{- $_ := set $own "checksum/configuration" (include "cotenant.configuration" (list $root $object.metadata.name) | sha256sum) -}}
{{- end -}}
{{- $_ := set $template.metadata "annotations" $own -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" -}}
{{- with get $values $key }}{{ $_ := set $spec $key . }}{{ end -}}
{{- end -}}
{{- with $root.Values.imagePullSecrets }}{{ $_ := set $spec "imagePullSecrets" . }}{{ end -}}
{{- if $values.hostNetwork }}{{ $_ := set $spec "hostNetwork" true }}{{ $_ := set $spec "dnsPolicy" "ClusterFirstWithHostNet" }}{{ end -}}
{{- range $spec.volumes -}}
{{- if and (eq .name "pod-resources") (get $values "kubeletRoot") }}{{ $_ := set .hostPath "path" (printf "%s/pod-resources" $values.kubeletRoot) }}{{ end -}}
{{- end -}}
{{- range $container := concat ($spec.initContainers | default list) $spec.containers -}}
{{- if eq .name "scheduler" -}}
{{- $tag := $root.Values.scheduler.image.tag | default (regexFind "^v[0-9]+\\.[0-9]+\\.[0-9]+" $root.Capabilities.KubeVersion.Version) -}}
{{- $_ := set . "image" (printf "%s:%s" $root.Values.scheduler.image.repository $tag) -}}
{{- /* it may be one minor version older than the cluster, and before 1.31 has no /readyz */ -}}
{{- if semverCompare "<1.32.0-0" $root.Capabilities.KubeVersion.Version }}{{ $_ := set .readinessProbe.httpGet "path" "/healthz" }}{{ end -}}
{{- else -}}
{{- $image := $root.Values.image -}}
{{- $_ := set . "image" (ternary (printf "%s@%s" $image.repository $image.digest) (printf "%s:%s" $image.repository ($image.tag | default $root.Chart.AppVersion)) (ne $image.digest "")) -}}
{{- $_ := set . "imagePullPolicy" $image.pullPolicy -}}
{{- end -}}
{{- /* each container has its own; the init container that mounts MPS' shared memory keeps what it has */ -}}
{{- $resources := dict "scheduler" $root.Values.scheduler.resources "extender" $root.Values.extender.resources "device-plugin" $root.Values.devicePlugin.resources "nursery" $root.Values.devicePlugin.mps.nurseryResources -}}
{{- with get $resources .name }}{{ $_ := set $container "resources" . }}{{ end -}}
{{- if $values.extraEnv }}{{ $_ := set . "env" (concat (.env | default list) $values.extraEnv) }}{{ end -}}
{{- if and (eq $object.kind "DaemonSet") (hasKey . "args") $values.memoryWatchdog -}}
{{- /* a flag wins over the file, and of two the later */ -}}
{{- with dig "watchdog" "interval" 0 $values.configuration }}{{ $_ := set $container "args" (append $container.args (printf "--watchdog-interval=%v" .)) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The policies have the unit, the scheduler and its other profiles as variables of these names. */}}
{{- define "cotenant.policy" -}}
{{- $root := index . 0 -}}
{{- range (index . 1).spec.variables -}}
{{- if eq .name "unit" }}{{ $_ := set . "expression" (include "cotenant.unitBytes" $root) }}{{ end -}}
{{- if eq .name "scheduler" }}{{ $_ := set . "expression" (ternary "''" (printf "'%s'" $root.Values.schedulerName) (eq $root.Values.layout "attached")) }}{{ end -}}
{{- if eq .name "profiles" }}{{ $_ := set . "expression" (keys ($root.Values.extender.configuration.profilePolicies | default dict) | sortAlpha | toJson) }}{{ end -}}
{{- end -}}
{{- end }}

{{- define "cotenant.unitBytes" -}}
{{- $size := regexFind "[MG]iB$" .Values.unit -}}
{{- mul (trimSuffix $size .Values.unit) (ternary 1073741824 1048576 (eq $size "GiB")) -}}
{{- end }}

{{- define "cotenant.network" -}}
{{- $root := index . 0 -}}
{{- range (index . 1).spec.ingress -}}
{{- $port := (first .ports).port | toString -}}
{{- if and (eq $port "verbs") $root.Values.networkPolicy.verbsFromCIDRs -}}
{{- $peers := list -}}
{{- range $root.Values.networkPolicy.verbsFromCIDRs }}{{ $peers = append $peers (dict "ipBlock" (dict "cidr" .)) }}{{ end -}}
{{- $_ := set . "from" $peers -}}
{{- else if and (has $port (list "serve" "9481")) $root.Values.networkPolicy.serveFrom -}}
{{- $_ := set . "from" $root.Values.networkPolicy.serveFrom -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "cotenant.admission" -}}
{{- if ne .Values.admission "auto" }}{{ .Values.admission }}
{{- else if semverCompare ">=1.36.0-0" .Capabilities.KubeVersion.Version }}policies
{{- else }}webhook
{{- end }}
{{- end }}
