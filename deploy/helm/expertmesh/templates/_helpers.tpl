{{- define "expertmesh.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "expertmesh.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "expertmesh.labels" -}}
{{ include "expertmesh.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "expertmesh.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}{{ end -}}
{{- end }}

{{/* Ranks of a role in the whole mesh. */}}
{{- define "expertmesh.count" -}}
{{ mul .groups .podsPerGroup .ranksPerPod }}
{{- end }}

{{/* Where the balancer is: of one alone its service, which needs no new look-up when its pod changes; else each by its name. */}}
{{- define "expertmesh.balancers" -}}
{{- $name := include "expertmesh.name" . }}
{{- $port := .Values.ports.balancer | int }}
{{- $addresses := list }}
{{- range $number := until (.Values.balancer.replicas | int) }}
{{- $addresses = append $addresses (printf "%s-balancer-%d.%s-balancers:%d" $name $number $name $port) }}
{{- end }}
{{- if gt (len $addresses) 1 }}{{ join "," $addresses }}{{ else }}{{ printf "%s-balancer:%d" $name $port }}{{ end -}}
{{- end }}

{{/* What the mesh is to another one: prefill, decode or nothing. */}}
{{- define "expertmesh.disaggregation" -}}
{{ dig "disaggregation" "role" "" .Values.mesh }}
{{- end }}

{{/* mesh.yaml: what the values say, and what follows from them. */}}
{{- define "expertmesh.mesh" -}}
{{- $ports := .Values.ports }}
{{- $derived := dict
  "both_servers" (include "expertmesh.count" .Values.both | int)
  "router" (dict "port" ($ports.router | int) "http" (dict "port" ($ports.http | int)))
  "balancer" (dict "port" ($ports.balancer | int) "address" (include "expertmesh.balancers" .) "state_dir" "/state")
  "attention" (dict "servers" (include "expertmesh.count" .Values.attention | int) "port" ($ports.rank | int))
  "expert" (dict "servers" (include "expertmesh.count" .Values.expert | int) "port" ($ports.rank | int))
  "dataplane" (dict "port" ($ports.dataplane | int))
  "telemetry" (dict "metrics_port" ($ports.metrics | int)) }}
{{- $secret := dict }}
{{- if $ports.page }}
{{- $_ := set $derived.balancer "page_port" ($ports.page | int) }}
{{- end }}
{{- if eq (include "expertmesh.disaggregation" .) "prefill" }}
{{- $_ := set $derived "disaggregation" (dict "port" ($ports.kv | int)) }}
{{- end }}
{{- if .Values.secrets.tls }}
{{- $_ := set $secret "tls" (dict "cert_file" "/secrets/tls/{role}.pem" "key_file" "/secrets/tls/{role}.key" "ca_file" "/secrets/tls/ca.pem") }}
{{- end }}
{{- if .Values.secrets.apiKeys }}
{{- $_ := set $secret "api" (dict "keys_file" "/secrets/api/keys.json") }}
{{- end }}
{{- toYaml (mergeOverwrite $secret (deepCopy .Values.mesh) $derived) }}
{{- end }}

{{- define "expertmesh.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "expertmesh.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
runAsNonRoot: true
capabilities: { drop: ["ALL"] }
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{/* Of every pod: who it is, and where compilers and libraries may write. */}}
{{- define "expertmesh.env" -}}
- { name: POD_NAME, valueFrom: { fieldRef: { fieldPath: metadata.name } } }
- { name: POD_IP, valueFrom: { fieldRef: { fieldPath: status.podIP } } }
- { name: NODE_NAME, valueFrom: { fieldRef: { fieldPath: spec.nodeName } } }
- { name: HOME, value: /cache }
- { name: NUMBA_CACHE_DIR, value: /cache/numba }
- { name: TRITON_CACHE_DIR, value: /cache/triton }
{{- if .Values.secrets.huggingFace }}
- { name: HF_TOKEN_PATH, value: /secrets/huggingface/token }
{{- end }}
{{- end }}

{{- define "expertmesh.volumeMounts" -}}
- { name: mesh, mountPath: /etc/expertmesh, readOnly: true }
- { name: cache, mountPath: /cache }
- { name: tmp, mountPath: /tmp }
{{- if .Values.secrets.tls }}
- { name: tls, mountPath: /secrets/tls, readOnly: true }
{{- end }}
{{- if .Values.secrets.apiKeys }}
- { name: api, mountPath: /secrets/api, readOnly: true }
{{- end }}
{{- if .Values.secrets.huggingFace }}
- { name: huggingface, mountPath: /secrets/huggingface, readOnly: true }
{{- end }}
{{- if .Values.model.claim }}
- { name: models, mountPath: {{ .Values.model.mountPath }}, readOnly: true }
{{- end }}
{{- end }}

{{- define "expertmesh.volumes" -}}
- { name: mesh, configMap: { name: {{ include "expertmesh.name" .root }} } }
- { name: cache, emptyDir: { sizeLimit: {{ .root.Values.scratch.cache }} } }
- { name: tmp, emptyDir: { sizeLimit: {{ .root.Values.scratch.tmp }} } }
{{- if .root.Values.secrets.tls }}
- name: tls # its own key and no other
  secret:
    secretName: {{ .root.Values.secrets.tls }}
    defaultMode: 288
    items:
      - { key: ca.pem, path: ca.pem }
      - { key: {{ .role }}.pem, path: {{ .role }}.pem }
      - { key: {{ .role }}.key, path: {{ .role }}.key }
{{- end }}
{{- with .root.Values.secrets.apiKeys }}
- { name: api, secret: { secretName: {{ . }}, defaultMode: 288 } }
{{- end }}
{{- with .root.Values.secrets.huggingFace }}
- { name: huggingface, secret: { secretName: {{ . }}, defaultMode: 288 } }
{{- end }}
{{- with .root.Values.model.claim }}
- { name: models, persistentVolumeClaim: { claimName: {{ . }}, readOnly: true } }
{{- end }}
{{- end }}

{{/* Whether it may get requests. The kubelet speaks no TLS to a gRPC health service: with TLS it can only see who listens. */}}
{{- define "expertmesh.readiness" -}}
{{- if .root.Values.secrets.tls -}}
tcpSocket: { port: {{ .port }} }
{{- else -}}
grpc: { port: {{ .port }} }
{{- end }}
{{- end }}

{{/* A router answers for a while after it was asked to end, since services lead to it for a moment more, and then drains. */}}
{{- define "expertmesh.grace" -}}
{{- $grace := .root.Values.terminationGracePeriodSeconds | int }}
{{- if eq .role "router" }}{{ max $grace (add .root.Values.router.preStopSeconds 35) }}{{ else }}{{ $grace }}{{ end -}}
{{- end }}

{{- define "expertmesh.pod" -}}
{{- $values := get .root.Values .role }}
serviceAccountName: {{ include "expertmesh.name" .root }}-{{ .role }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "expertmesh.grace" . }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- include "expertmesh.podSecurity" . | nindent 2 }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ .spread }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "expertmesh.selector" . | nindent 8 }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "expertmesh.selector" . | nindent 8 }}
{{- end }}
