# Locust users and the scaling report. Build from the root of the repository:
#   docker build -f deploy/loadtest.Dockerfile -t attnserve-loadtest .
FROM python:3.11-slim
WORKDIR /app
COPY constraints.txt ./
COPY proto ./proto
COPY client ./client
COPY lens ./lens
COPY loadtest ./loadtest
RUN pip install --no-cache-dir -c constraints.txt ./proto ./client ./loadtest './lens[context]' \
    && useradd --create-home attnserve && mkdir /reports && chown attnserve /reports
USER attnserve
EXPOSE 8089
ENTRYPOINT ["attnserve-loadtest"]
CMD ["--help"]
