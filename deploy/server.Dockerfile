# attnserve-server. Build from the root of the repository:
#   docker build -f deploy/server.Dockerfile --target cpu -t attnserve-server:cpu .
#   docker build -f deploy/server.Dockerfile --target gpu -t attnserve-server:gpu .
# The operators in kernels are compiled once, where there is a compiler.
FROM python:3.11 AS kernels
COPY kernels /kernels
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /kernels

FROM python:3.11-slim AS cpu
WORKDIR /app
COPY constraints.txt ./
COPY proto ./proto
COPY server ./server
COPY deploy/healthcheck.py ./
COPY --from=kernels /wheels /wheels
RUN pip install --no-cache-dir -c constraints.txt /wheels/*.whl ./proto ./server \
    && useradd --create-home attnserve
USER attnserve
EXPOSE 8001 8002
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s CMD ["python", "/app/healthcheck.py", "127.0.0.1:8001"]
ENTRYPOINT ["attnserve-server"]
CMD ["--repository", "/models", "--host", "0.0.0.0", "--port", "8001", "--metrics-port", "8002"]

# The CUDA libraries come from PyPI beside onnxruntime; the driver comes from the host.
FROM cpu AS gpu
USER root
RUN pip install --no-cache-dir -c constraints.txt "onnxruntime-gpu[cuda,cudnn]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER attnserve
CMD ["--repository", "/models", "--host", "0.0.0.0", "--port", "8001", "--metrics-port", "8002", "--provider", "cuda"]
