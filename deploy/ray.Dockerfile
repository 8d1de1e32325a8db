# A node of a Ray cluster that runs attnserve's servers. Build from the root of the repository, over
# the image of the server:
#   docker build -f deploy/server.Dockerfile --target cpu -t attnserve-server:cpu .
#   docker build -f deploy/ray.Dockerfile -t attnserve-ray:cpu .
# For GPUs, with that image's target gpu:
#   docker build -f deploy/ray.Dockerfile -t attnserve-ray:gpu \
#     --build-context attnserve-server:cpu=docker-image://attnserve-server:gpu .
FROM attnserve-server:cpu
USER root
# KubeRay asks a node how it is by wget.
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/ray ./ray
RUN pip install --no-cache-dir -c constraints.txt 'ray[default]' ./ray
ENV RAY_USAGE_STATS_ENABLED=0
USER attnserve
HEALTHCHECK NONE
ENTRYPOINT ["attnserve-cluster"]
CMD ["--help"]
