# One image for every cluster role: pipeline steps, MLflow, the Evidently UI, the ranker's server.
FROM python:3.11-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 \
    DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true

WORKDIR /opt/evergreen
COPY requirements.lock ./
# The last two are the cluster's drivers: Postgres and an object store behind MLflow.
RUN pip install -r requirements.lock && pip install psycopg2-binary==2.9.13 boto3==1.44.5

COPY pyproject.toml ./
COPY evergreen evergreen
COPY pipelines pipelines
COPY components components
COPY serving serving
COPY monitoring monitoring
COPY model model
COPY feature_repo feature_repo
COPY engagement engagement
RUN pip install --no-deps --no-build-isolation . && pip check

USER 10001:10001
WORKDIR /tmp
CMD ["evergreen", "--help"]
