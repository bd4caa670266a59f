sh -c 'set -e
command -v blobfuse2 > /dev/null || { { apt-cache show blobfuse2 > /dev/null 2>&1 || { place=$(mktemp -d) && curl -fsSLo "$place/microsoft.deb" "https://packages.microsoft.com/config/ubuntu/$(. /etc/os-release; echo $VERSION_ID)/packages-microsoft-prod.deb" && sudo dpkg -i "$place/microsoft.deb" && rm -rf "$place"; }; } && sudo apt-get update -qq && sudo apt-get install -y -qq blobfuse2 fuse3; }
if [ ! -e /var/cache/launch-blobfuse ]; then
  place=/mnt
  for disk in $(lsblk -dnpo NAME | grep nvme); do
    # lsblk prints one word for a disk without partitions, file system and mount point.
    [ "$(lsblk -npo NAME,FSTYPE,MOUNTPOINT "$disk" | wc -w)" = 1 ] || continue
    sudo mkfs.ext4 -q "$disk" && sudo mkdir -p /mnt/launch-nvme && sudo mount "$disk" /mnt/launch-nvme || continue
    place=/mnt/launch-nvme
    break
  done
  sudo mkdir -p "$place/launch-blobfuse" && sudo ln -sfn "$place/launch-blobfuse" /var/cache/launch-blobfuse
fi
sudo mkdir -p /etc/launch-mounts
printf %s '"'"'read-only: true
allow-other: true
logging:
  type: syslog
  level: log_warning
components:
- libfuse
- file_cache
- attr_cache
- azstorage
libfuse:
  attribute-expiration-sec: 7200
  entry-expiration-sec: 7200
file_cache:
  path: /var/cache/launch-blobfuse/data
  timeout-sec: 31536000
attr_cache:
  timeout-sec: 7200
azstorage:
  type: adls
  account-name: imagenet
  endpoint: https://imagenet.dfs.core.windows.net
  container: images
  mode: msi
  subdirectory: '"'"'"'"'"'"'"'"'2012'"'"'"'"'"'"'"'"'
'"'"' | sudo tee /etc/launch-mounts/data.yaml > /dev/null
mountpoint -q /data || { sudo mkdir -p /data /var/cache/launch-blobfuse/data && sudo blobfuse2 mount /data --config-file=/etc/launch-mounts/data.yaml; }' > /home/ubuntu/launch/mounts.log 2>&1 || cat /home/ubuntu/launch/mounts.log
