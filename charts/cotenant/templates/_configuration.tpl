{{/* The configuration files of a workload, by name, as YAML: those of the manifests, with what values say over them. */}}
{{- define "cotenant.configuration" -}}
{{- $root := index . 0 -}}
{{- $values := $root.Values -}}
{{- $files := dict -}}
{{- $shared := dict "domain" $values.domain "migDomain" $values.migDomain "unit" $values.unit -}}
{{- if hasPrefix "cotenant-device-plugin" (index . 1) -}}
{{- $_ := set $files "device-plugin-config.yaml" (mergeOverwrite (include "cotenant.pluginConfiguration" $root | fromYaml) $shared | toYaml) -}}
{{- with $values.devicePlugin.mig.configs }}{{ $_ := set $files "mig-configs.yaml" (dict "version" "v1" "mig-configs" . | toYaml) }}{{ end -}}
{{- with $values.devicePlugin.fakeGPUs }}{{ $_ := set $files "fake-gpus.yaml" (toYaml .) }}{{ end -}}
{{- else -}}
{{- $shipped := include "cotenant.text" (list $root (printf "%s/extender-config.yaml" $values.layout)) | fromYaml -}}
{{- $_ := set $shared "schedulerName" $values.schedulerName -}}
{{- if eq (include "cotenant.admission" $root) "webhook" -}}
{{- $_ := set $shared "tls" (dict "certFile" "/etc/cotenant-tls/tls.crt" "keyFile" "/etc/cotenant-tls/tls.key") -}}
{{- end -}}
{{- $_ := set $files "extender-config.yaml" (mergeOverwrite $shipped (deepCopy $values.extender.configuration) $shared | toYaml) -}}
{{- if eq $values.layout "second-scheduler" -}}
{{- $scheduler := include "cotenant.text" (list $root "second-scheduler/scheduler-config.yaml") | fromYaml -}}
{{- range $scheduler.profiles }}{{ $_ := set . "schedulerName" $values.schedulerName }}{{ end -}}
{{- $_ := set $files "scheduler-config.yaml" (mergeOverwrite $scheduler (deepCopy $values.scheduler.configuration) | toYaml) -}}
{{- end -}}
{{- end -}}
{{- toYaml $files -}}
{{- end }}

{{- define "cotenant.configMap" -}}
{{- $root := index . 0 -}}
{{- $object := dict "apiVersion" "v1" "kind" "ConfigMap" "metadata" (dict "name" (index . 1) "namespace" $root.Release.Namespace) "data" (include "cotenant.configuration" . | fromYaml) -}}
{{- include "cotenant.labels" (list $root $object.metadata) -}}
---
{{ toYaml $object }}
{{ end }}
