{{/*
The webhook's certificate as base64, by the keys of a Secret. Made once: an upgrade finds it in the cluster. Rendering
asks for it several times, so it is kept beside the values.
*/}}
{{- define "cotenant.certificate" -}}
{{- if not (hasKey .Values "_certificate") -}}
{{- $name := .Values.webhook.existingSecret | default "cotenant-webhook" -}}
{{- $found := (lookup "v1" "Secret" .Release.Namespace $name).data | default dict -}}
{{- if and (not $found) (not .Values.webhook.existingSecret) -}}
{{- $host := printf "cotenant-extender.%s.svc" .Release.Namespace -}}
{{- $authority := genCA "cotenant-webhook" 3650 -}}
{{- $leaf := genSignedCert $host nil (list $host (printf "%s.cluster.local" $host)) 3650 $authority -}}
{{- $found = dict "ca.crt" (b64enc $authority.Cert) "tls.crt" (b64enc $leaf.Cert) "tls.key" (b64enc $leaf.Key) -}}
{{- end -}}
{{- $_ := set .Values "_certificate" $found -}}
{{- end -}}
{{- toYaml .Values._certificate -}}
{{- end }}

{{/* Has the extender serve by HTTPS. */}}
{{- define "cotenant.serveTLS" -}}
{{- $root := index . 0 -}}
{{- $spec := (index . 1).spec.template.spec -}}
{{- $secret := $root.Values.webhook.existingSecret | default "cotenant-webhook" -}}
{{- $_ := set $spec "volumes" (append $spec.volumes (dict "name" "tls" "secret" (dict "secretName" $secret))) -}}
{{- range concat ($spec.initContainers | default list) $spec.containers -}}
{{- if eq .name "extender" -}}
{{- $_ := set . "volumeMounts" (append .volumeMounts (dict "name" "tls" "mountPath" "/etc/cotenant-tls" "readOnly" true)) -}}
{{- end -}}
{{- /* kube-scheduler's liveness asks the extender, too */ -}}
{{- range list .startupProbe .readinessProbe .livenessProbe -}}
{{- if . }}{{ if has (toString .httpGet.port) (list "serve" "9481") }}{{ $_ := set .httpGet "scheme" "HTTPS" }}{{ end }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}
