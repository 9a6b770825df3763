{{- define "dfastllm.name" -}}
{{ printf "%s" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "dfastllm.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "dfastllm.labels" -}}
{{ include "dfastllm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
