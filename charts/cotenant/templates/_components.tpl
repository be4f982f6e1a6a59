{{/*
What the modes of sharing need of a node. It stands in ../files/components, whose patches are applied here as kustomize
applies them, so that both give the same rights: include "cotenant.components" (list $ $daemonSet).
*/}}
{{- define "cotenant.components" -}}
{{- $root := index . 0 -}}
{{- $object := index . 1 -}}
{{- $plugin := $root.Values.devicePlugin -}}
{{- include "cotenant.refuseModesWithoutRights" $root -}}
{{- if $plugin.mig.enabled }}{{ include "cotenant.component" (list $root $object "mig") }}{{ end -}}
{{- if $plugin.mps.enabled }}{{ include "cotenant.component" (list $root $object "mps") }}{{ end -}}
{{- if $plugin.memoryWatchdog }}{{ include "cotenant.component" (list $root $object "memory-watchdog") }}{{ end -}}
{{- if $plugin.fakeGPUs }}{{ include "cotenant.component" (list $root $object "fake-gpus") }}{{ end -}}
{{- if $plugin.nvidiaConfigMap -}}
{{- include "cotenant.component" (list $root $object "nvidia-config") -}}
{{- range $object.spec.template.spec.volumes -}}
{{- if eq .name "nvidia-config" }}{{ $_ := set .configMap "name" $plugin.nvidiaConfigMap }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "cotenant.component" -}}
{{- $object := index . 1 -}}
{{- $component := include "cotenant.text" (list (index . 0) (printf "components/%s/kustomization.yaml" (index . 2))) | fromYaml -}}
{{- range $component.patches -}}
{{- if and (eq .target.kind $object.kind) (eq .target.name $object.metadata.name) -}}
{{- range fromYamlArray .patch }}{{ include "cotenant.operation" (list $object .) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* One operation of a JSON patch: those that the components use. A list grows at its end alone, as text does in Helm. */}}
{{- define "cotenant.operation" -}}
{{- $operation := index . 1 -}}
{{- $parts := splitList "/" (trimPrefix "/" $operation.path) -}}
{{- $last := last $parts -}}
{{- $at := index . 0 -}}
{{- $above := $at -}}
{{- $key := "" -}}
{{- range initial $parts -}}
{{- $above = $at -}}
{{- $key = . -}}
{{- if kindIs "slice" $at }}{{ $at = index $at (atoi .) }}{{ else }}{{ $at = index $at . }}{{ end -}}
{{- end -}}
{{- if eq $operation.op "test" -}}
{{- if ne (get $at $last) $operation.value }}{{ fail (printf "%s is not %v: the component does not fit the object" $operation.path $operation.value) }}{{ end -}}
{{- else if eq $operation.op "remove" -}}
{{- $_ := unset $at $last -}}
{{- else if eq $last "-" -}}
{{- $_ := set $above $key (append $at $operation.value) -}}
{{- else -}}
{{- $_ := set $at $last $operation.value -}}
{{- end -}}
{{- end }}

{{/* The plugin's configuration as it will be read, without what the sections above name. */}}
{{- define "cotenant.pluginConfiguration" -}}
{{- $plugin := .Values.devicePlugin -}}
{{- $given := deepCopy $plugin.configuration -}}
{{- $merged := include "cotenant.text" (list . "base/device-plugin-config.yaml") | fromYaml -}}
{{- range $mode := list "mig" "mps" -}}
{{- if (get $plugin $mode).enabled -}}
{{- $merged = mergeOverwrite $merged (include "cotenant.text" (list $ (printf "%s/device-plugin-config.yaml" $mode)) | fromYaml) -}}
{{- end -}}
{{- end -}}
{{- if or $given.gpus $given.profiles -}}
{{- $_ := set $merged "gpus" list -}}
{{- else if and $plugin.mig.enabled $plugin.mps.enabled -}}
{{- fail "devicePlugin.mig and devicePlugin.mps are both enabled: say in devicePlugin.configuration.gpus, or in its profiles, which GPUs are whose" -}}
{{- else if and $plugin.mps.enabled $plugin.nvidiaConfigMap -}}
{{- /* manifests/mps has all GPUs under MPS, and rules of ours go before NVIDIA's, which are to say which ones are. */ -}}
{{- $_ := set $merged "gpus" list -}}
{{- end -}}
{{- if $plugin.mps.nursery }}{{ $_ := set $merged.mps "nursery" "/run/cotenant/mps/nursery.sock" }}{{ end -}}
{{- if $plugin.mig.configs }}{{ $_ := set $merged "migConfigs" "/etc/cotenant/mig-configs.yaml" }}{{ end -}}
{{- mergeOverwrite $merged $given | toYaml -}}
{{- end }}

{{/* A mode that is configured and may not do what it must fails on the node, much later, and in the log of one program. */}}
{{- define "cotenant.refuseModesWithoutRights" -}}
{{- $plugin := .Values.devicePlugin -}}
{{- $given := $plugin.configuration -}}
{{- $rules := $given.gpus | default list -}}
{{- range $given.profiles }}{{ $rules = concat $rules . }}{{ end -}}
{{- range $rules -}}
{{- if and (eq (.mode | default "") "mps") (not $plugin.mps.enabled) -}}
{{- fail "devicePlugin.configuration has a rule of mode mps, for which the device plugin has to be privileged and see the node's processes: set devicePlugin.mps.enabled=true, or take the rule out" -}}
{{- end -}}
{{- if and (eq (.family | default "") "mig-dynamic") (not $plugin.mig.enabled) -}}
{{- fail "devicePlugin.configuration has a rule of family mig-dynamic, for which the device plugin needs SYS_ADMIN and the node's CDI folder: set devicePlugin.mig.enabled=true, or take the rule out" -}}
{{- end -}}
{{- end -}}
{{- if and $plugin.mps.nursery (not $plugin.mps.enabled) -}}
{{- fail "devicePlugin.mps.nursery keeps MPS daemons, and there are none: set devicePlugin.mps.enabled=true, or take it out" -}}
{{- end -}}
{{- if and $plugin.mig.configs (not $plugin.mig.enabled) -}}
{{- fail "devicePlugin.mig.configs has the device plugin cut GPUs, for which it needs SYS_ADMIN: set devicePlugin.mig.enabled=true, or take the geometries out" -}}
{{- end -}}
{{- $static := false -}}
{{- range $rules }}{{ if eq (.family | default "") "mig-static" }}{{ $static = true }}{{ end }}{{ end -}}
{{- if and $plugin.mig.configs (not $static) -}}
{{- fail "devicePlugin.mig.configs says how static GPUs are cut, and no rule makes any GPU static: add {family: mig-static} to devicePlugin.configuration.gpus, or take the geometries out" -}}
{{- end -}}
{{- if $given.migConfigs -}}
{{- fail "devicePlugin.configuration.migConfigs names a path of which nothing is mounted: write the geometries into devicePlugin.mig.configs instead" -}}
{{- end -}}
{{- $mounted := dict "mps.root" (dig "mps" "root" "" $given) "mps.shm" (dig "mps" "shm" "" $given) "cdiDirectory" ($given.cdiDirectory | default "") "cdiStaticDirectories" ($given.cdiStaticDirectories | default list | join ", ") -}}
{{- range $key, $path := $mounted -}}
{{- if $path }}{{ fail (printf "devicePlugin.configuration.%s is %s, and the chart mounts the folder that is the default: take the key out" $key $path) }}{{ end -}}
{{- end -}}
{{- if $given.nvidiaConfig -}}
{{- fail "devicePlugin.configuration.nvidiaConfig names a path of which nothing is mounted: name the ConfigMap in devicePlugin.nvidiaConfigMap instead" -}}
{{- end -}}
{{- if $given.serve -}}
{{- fail (printf "devicePlugin.configuration.serve is %s, and the chart's flag, port and probes are of [::]:9482, which is every address: take the key out" $given.serve) -}}
{{- end -}}
{{- if and (dig "watchdog" "interval" 0 $given | float64) (not $plugin.memoryWatchdog) -}}
{{- fail "devicePlugin.configuration.watchdog.interval is set, and without the node's PID namespace the watchdog sees no process: set devicePlugin.memoryWatchdog=true, or take the interval out" -}}
{{- end -}}
{{- end }}
